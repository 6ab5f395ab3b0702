"""The studio's page on localhost: Voila, with a limit to its visitors. A process of its own, started by `snapgen demo`.

Voila starts a kernel for each visitor and lets a page send nothing but messages of widgets: no code of a visitor ever runs.
A visitor's kernel holds widgets only; the models are in the engine's process.
"""

import os
import sys
from pathlib import Path
from typing import Any

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.ioloop import IOLoop
from tornado.web import Finish, HTTPError
from traitlets.config import Config
from voila.app import Voila

IDLE_SECONDS = 1200  # after which a kernel ends, though its page is open
LOADING_SECONDS = 60  # in which a page has to connect to its kernel
GRACE_SECONDS = 3  # in which a page that has lost its kernel may come back to it
VISITORS = "SNAPGEN_STUDIO_VISITORS"  # environment variable: the most kernels at once
FULL = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>SnapGen studio: full</title>
<meta http-equiv="refresh" content="10"><style>:root {{ color-scheme: light dark }} body {{ font: 18px/1.5 system-ui, sans-serif; max-width: 32em; margin: 15vh auto; padding: 0 1em }}</style>
<h1>Please wait</h1><p role="status">The studio is full: {visitors} of {visitors} visitors are there. This page tries again every ten seconds; <a href="">try now</a>.</p></html>"""


class Kernels(AsyncMappingKernelManager):
    """Knows of the kernels that are about to start, too, and ends those whose page has gone or never came."""

    starting = 0

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.left: set[str] = set()  # kernels whose page has gone

    async def start_kernel(self, *args: Any, **more: Any) -> str:
        self.starting += 1
        try:
            kernel_id = await super().start_kernel(*args, **more)
        finally:
            self.starting -= 1
        IOLoop.current().call_later(LOADING_SECONDS, self._end_if_left, kernel_id)
        return kernel_id

    def notify_connect(self, kernel_id: str) -> None:
        super().notify_connect(kernel_id)
        self.left.discard(kernel_id)

    def notify_disconnect(self, kernel_id: str) -> None:
        super().notify_disconnect(kernel_id)
        self.left.add(kernel_id)
        IOLoop.current().call_later(GRACE_SECONDS, self._end_if_left, kernel_id)

    async def _end_if_left(self, kernel_id: str) -> None:
        if kernel_id in self and not self._kernel_connections.get(kernel_id):
            await self.shutdown_kernel(kernel_id)
            self.left.discard(kernel_id)

    def taken(self) -> int:
        """Places that are taken; who reloads a page gives up the old one at once."""
        return len(set(self.list_kernel_ids()) - self.left) + self.starting


def at_the_door(handler: Any, notebook: Any, cwd: str) -> None:
    """Who comes when all places are taken gets a page that says so; other sites may not open the studio in secret."""
    if handler.request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise HTTPError(403, "the studio is opened from its own address")
    visitors = int(os.environ[VISITORS])
    if handler.kernel_manager.taken() >= visitors:
        handler.set_status(503)
        handler.set_header("Content-Type", "text/html; charset=utf-8")
        handler.set_header("Retry-After", "10")
        handler.write(FULL.format(visitors=visitors))
        raise Finish


def configuration(port: int, theme: str) -> Config:
    config = Config()
    # Voila lets any name of the host pass, under which a foreign page could reach this server.
    config.Voila.update(ip="127.0.0.1", port=port, port_retries=0, open_browser=False, tornado_settings={"allow_remote_access": False})
    config.VoilaConfiguration.update(theme=theme, show_tracebacks=False, multi_kernel_manager_class=Kernels, prelaunch_hook=at_the_door, allow_template_override="NO", file_allowlist=[])
    config.MappingKernelManager.update(cull_idle_timeout=IDLE_SECONDS, cull_interval=30, cull_connected=True)
    return config


if __name__ == "__main__":
    notebook, port, theme = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    Voila.launch_instance(argv=[str(notebook)], config=configuration(port, theme))

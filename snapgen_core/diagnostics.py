"""What to watch in an adversarial training: does one player win, do the pictures become alike?"""

from collections.abc import Sequence

RECENT = 100  # steps of the log
SATURATED, HELPLESS = 0.95, 0.55  # accuracy of a discriminator
COLLAPSED = 0.6  # of the diversity that the student began with


def concerns(log: Sequence[dict], watched: Sequence[dict]) -> list[str]:
    """What is wrong, a line each; none is good.

    Args:
        log: lines of a run's `log.jsonl`; those of the discriminator's turns have an "accuracy".
        watched: lines of `watch.jsonl`, each with a "diversity"; the first is that of the student at the start.
    """
    found = []
    accuracies = [line["accuracy"] for line in log[-RECENT:] if "accuracy" in line]
    if accuracies:
        accuracy = sum(accuracies) / len(accuracies)
        if accuracy > SATURATED:
            found.append(f"the discriminator is right on {accuracy:.0%} of the tokens: it has won, and its gradient teaches little (give it a lower rate, fewer turns, or R1)")
        if accuracy < HELPLESS:
            found.append(f"the discriminator is right on {accuracy:.0%} of the tokens, hardly better than chance: it has nothing to say (give it a higher rate or more turns)")
    if len(watched) > 1 and watched[-1]["diversity"] < COLLAPSED * watched[0]["diversity"]:
        found.append(f"pictures of one prompt have become alike: diversity {watched[-1]['diversity']:.3f}, {watched[0]['diversity']:.3f} at the start (give the teacher's term more weight)")
    return found

"""The generation studio without its page: what can be asked for, who does it, and what there is to show.

`order` says what a visitor may ask for, `engine` does it and tells along the way, `desk` keeps one visitor's state, `shared`
lets several visitors use one engine. `snapgen_core.widgets` is the page. Only `engine` needs torch.
"""

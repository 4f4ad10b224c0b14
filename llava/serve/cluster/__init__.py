"""One address for many workers: the controller's app, who gets a request, how it is relayed, who is alive, and how a worker registers.

It knows workers by their addresses and by what they say of themselves, and does not trust their words; it knows no engine and no model.
"""

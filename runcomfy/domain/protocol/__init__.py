"""
A small model of how machines are launched, paid for and stopped and how prompts are sent, searched through whole.

Tests try what somebody thought of. Here every order of every step is tried, of two processes, a cloud and a server,
with an answer lost, a list that lies, a process killed or suspended at any moment: `search` goes through all of it and
tells the shortest story in which an invariant breaks, or after which nothing comes to an end any more.

The decisions are not written down again: the model calls `domain.evidence`, `domain.machine`, `domain.queued`,
`domain.lease` and `domain.renewal`, as the application does. So a change there is searched, too. `rejected` lists
designs that somebody may find simpler, each one change away from ours, with the story that speaks against it.
"""

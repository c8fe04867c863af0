"""
Whole simulated days of the product, one per seed, in one thread and under virtual time.

The production controller (service, queue, pool, plan, reconciler) and the guard run unchanged above the ports, against
an emulated cloud and its ComfyUI servers that are reached in memory. Jobs come at random, something goes wrong every
two minutes on average, and the emulators' own books are the oracles. A seed replays exactly.

    loop      an event loop without selector, sockets or threads
    seeded    no chance and no clock but the seed's
    world     what takes part, and how a service is killed and comes back
    trace     what happened, as a story
    run       one day from its first job to its verdict
    load      jobs that come
    faults    what goes wrong
    oracles   what must hold
    switches  each invariant broken on purpose
"""

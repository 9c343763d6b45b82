"""Integer-only networks: ``lower`` a quantized graph to one record, and run that record anywhere.

    imodel = lower(qnet)                        # IntegerModel: operations and integers; every accumulator proved
    logits = run(imodel, images)                # NumPy, the reference
    save(imodel, "net.npz"); load("net.npz")    # read with NumPy alone
"""

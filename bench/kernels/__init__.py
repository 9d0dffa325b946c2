"""The `kernels` level: each op against other ways to compute it, forward, backward and memory."""

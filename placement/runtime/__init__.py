"""Expert parallelism on torch.distributed that follows a placement map. Never imports a solver."""

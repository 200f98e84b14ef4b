"""Several processes as one training job, on torch.distributed."""

"""Training steps: recurrent and parallel, as CUDA graphs, under `torch.compile`, and on several GPUs."""

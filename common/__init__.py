"""What training, evaluation, servers and the command line share: checkpoints, LLaVA data, packed turns, inference."""

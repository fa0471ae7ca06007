"""Where a run's figures go: JSON lines (the truth), MLflow (a copy) and the console. Floats in, no torch.

Import the parts from their modules; this package imports nothing, so that `import mlflow` stays lazy.
"""

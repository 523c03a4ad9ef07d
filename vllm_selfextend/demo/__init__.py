"""The passkey demo: its small model and the run that the command line shows."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The demo model, an ordinary `transformers` checkpoint trained on 256 tokens."""

"""Weights from Hugging Face and back."""

from pathlib import Path

from nemo.collections import llm

if __name__ == "__main__":
    model = llm.MistralModel(llm.MistralConfig7B())
    llm.import_ckpt(model=model, source="hf://mistralai/Mistral-7B-v0.3", output_path=Path("/weights/mistral"))
    llm.export_ckpt(path=Path("/runs/tuned/checkpoints/last"), target="hf", output_path=Path("/out/tuned"))

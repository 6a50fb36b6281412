"""NeMo Curator's reader and CLIP stage on some shards, one after the other in this process, without Ray.

    python3 -m venv peer && peer/bin/pip install "nemo-curator[image_cpu]==1.4.0" "transformers<5" nvidia-dali-cuda130

It knows one model, ViT-L/14 of transformers, here with random weights, and reads members called ``.jpg`` only. Its
reader gives DALI a GPU's number even where there is none, which DALI 2.4 refuses: the number is left out here. Prints
JSON with images, CPU and wall seconds, loading left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# This script has the name of the package.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]


def make_weights(folder: Path) -> None:
    """What the stage would download: a model, and a processor of which it uses the image half."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    text = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)


def main() -> None:
    """Embed, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--model", default="ViT-L-14", choices=["ViT-L-14", "ViT-L-14-quickgelu"])
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    import nvidia.dali

    pipeline_def = nvidia.dali.pipeline_def
    nvidia.dali.pipeline_def = lambda **options: pipeline_def(**{**options, "device_id": None})

    from nemo_curator.stages.image.embedders.clip_embedder import ImageEmbeddingStage
    from nemo_curator.stages.image.io.image_reader import ImageReaderStage
    from nemo_curator.tasks import FileGroupTask

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "openai/clip-vit-large-patch14")
        weights.mkdir(parents=True)
        make_weights(weights)
        embedder = ImageEmbeddingStage(model_dir=folder, model_inference_batch_size=args.batch_size)
        embedder.setup()
    reader = ImageReaderStage(num_threads=len(os.sched_getaffinity(0)))
    begin, before = time.perf_counter(), os.times()
    images = 0
    for url in args.shards:
        for batch in reader.process(FileGroupTask(dataset_name="peer", data=[url])):
            images += len(embedder.process(batch).data)
    wall, after = time.perf_counter() - begin, os.times()
    print(json.dumps({"images": images, "cpu_s": round(sum(after[:4]) - sum(before[:4]), 2), "wall_s": round(wall, 2)}))


if __name__ == "__main__":
    main()

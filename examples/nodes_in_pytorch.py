"""Answers in PyTorch from the nodes that `nectar export` wrote: the same model, without MLX.

nectar export book.nectar book.safetensors --dtype float32
python examples/nodes_in_pytorch.py book.safetensors path/to/the/model 2 7 1 8    # ids, of nectar.prompt

Needs torch and transformers, and a model whose layers all have full attention. Prints the ids of the answer.
"""

import argparse

import torch
from safetensors import safe_open
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

NODES: dict[str, torch.Tensor] = {}


def behind_nodes(module, queries, keys, values, attention_mask, *, scaling, **_):
    """Attention of queries [B, H, T, D] over the layer's nodes and the live keys and values [B, K, S, D]."""
    node_keys, node_values, bias = (NODES[f"layers.{module.layer_idx}.{n}"] for n in ("keys", "values", "bias"))
    B, H, T, _ = queries.shape
    K, S = keys.shape[1], keys.shape[2]
    keys = torch.cat([node_keys.expand(B, -1, -1, -1), keys], dim=2).repeat_interleave(H // K, dim=1)
    values = torch.cat([node_values.expand(B, -1, -1, -1), values], dim=2).repeat_interleave(H // K, dim=1)
    causal = torch.full((T, S), float("-inf")).triu(S - T + 1).expand(H, T, S)
    mask = torch.cat([bias.repeat_interleave(H // K, dim=0)[:, None].expand(H, T, -1), causal], dim=-1)
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2), None


def load(nodes, folder):
    """The model, behind the nodes of a file, and the position of the first token that follows them."""
    with safe_open(nodes, "pt") as file:
        start = int(file.metadata()["start"])
        NODES.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    AttentionInterface.register("behind_nodes", behind_nodes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="behind_nodes"), start


@torch.no_grad()
def answer(model, start, prompt, *, tokens=40):
    """The likeliest continuation of a prompt's ids, token by token, and the logits [tokens, V] it was chosen by."""
    cache, ids, logits = DynamicCache(), torch.tensor([prompt]), []
    position, written = start, []
    for _ in range(tokens):
        positions = torch.arange(position, position + ids.shape[1])[None]
        logits.append(model(ids, position_ids=positions, past_key_values=cache).logits[0, -1])
        position += ids.shape[1]
        written.append(int(logits[-1].argmax()))
        ids = torch.tensor([[written[-1]]])
    return written, torch.stack(logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", help="the file that `nectar export` wrote")
    parser.add_argument("model", help="the folder of the model, as transformers reads it")
    parser.add_argument("ids", type=int, nargs="+", help="of the prompt's tokens")
    arguments = parser.parse_args()
    model, start = load(arguments.nodes, arguments.model)
    print(*answer(model, start, arguments.ids)[0])

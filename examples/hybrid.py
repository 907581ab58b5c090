"""A model whose layers mostly keep a recurrent state: its .nectar beside its prompt cache, in bytes and seconds.

python examples/hybrid.py                             a random toy and a text of 1,200 tokens
python examples/hybrid.py book.nectar --model NAME    a file of yours, and its model
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from nectar_mlx import Nectar, cli  # first: it loads an optimised BLAS, which must precede mlx.core

import mlx.core as mx  # isort: skip
from mlx_lm.models import qwen3_next  # isort: skip
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache  # isort: skip

from nectar_mlx.mlxlm.attention_patch import make_prompt_cache_of  # isort: skip

READ = 512  # tokens at a time


def toy():
    """A random model of 4 layers, one with attention, and a tokenizer of bytes."""
    sys.path.append(str(Path(__file__).parent.parent))  # the clone, where nectar_mlx is not installed from it in place
    from tests import toys

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "partial_rotary_factor": 0.25}
    delta = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 4}
    delta |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    experts = {"num_experts": 0, "num_experts_per_tok": 0, "decoder_sparse_step": 1, "mlp_only_layers": []}
    experts |= {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 0}
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 192, "vocab_size": toys.VOCABULARY}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 32768, "tie_word_embeddings": True}
    args = qwen3_next.ModelArgs(model_type="qwen3_next", **sizes, **heads, **delta, **experts, **rest)
    mx.random.seed(0)
    model = qwen3_next.Model(args)
    model.eval()
    mx.eval(model.parameters())
    return model, toys.tokenizer()


def seconds(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def first_token(model, caches, prompt):
    return int(mx.argmax(model(mx.array([prompt]), cache=caches)[0, -1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nectar", nargs="?")
    cli.add_model(parser)
    parser.add_argument("--tokens", type=int, default=1200, help="of the toy's text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.nectar:
            model, tokenizer, nectar = cli.load(args.nectar, args)
            path = Path(args.nectar)
        else:
            model, tokenizer = toy()
            text = " ".join(f"The {i}th fox sees {i * 7 % 31} dogs." for i in range(args.tokens // 18))
            settings = {"queries": 600, "conversations": 8, "steps": 30, "checks": 2, "answer_tokens": 16}
            nectar, path = Nectar.fit(model, tokenizer, text, budget="2%", **settings), Path(folder) / "toy.nectar"
            nectar.save(path)
        prompt = nectar.prompt(tokenizer, "Who sees most dogs?")

        def read():
            caches = make_prompt_cache_of(model)
            for start in range(0, len(nectar.prefix), READ):
                model(mx.array([nectar.prefix[start : start + READ]]), cache=caches)
                mx.eval([cache.state for cache in caches])
            return caches

        reading, caches = seconds(read)
        saved = Path(folder) / "prompt.safetensors"
        save_prompt_cache(str(saved), caches)
        from_cache, _ = seconds(lambda: first_token(model, load_prompt_cache(str(saved)), prompt))
        from_file, _ = seconds(lambda: first_token(model, Nectar.load(path, model).make_cache(), prompt))
        cold, _ = seconds(lambda: first_token(model, make_prompt_cache(model), prompt))
        state = nectar.report.get("state", {})
        print(
            f"{len(nectar.prefix):,} tokens; {len(nectar.geometry.fitted)} of {nectar.geometry.n_layers} layers attend"
        )
        print(
            f"prompt cache    {saved.stat().st_size:>12,} bytes; first token {from_cache:.3f} s from the saved cache,"
        )
        print(f"                {'':>12}        {reading + cold:.3f} s if the text is read again")
        print(f"the .nectar     {path.stat().st_size:>12,} bytes; first token {from_file:.3f} s, the file checked")
        print(f"  of it states  {state.get('bytes', 0):>12,} bytes, in {state.get('bits', '-')} bits")


if __name__ == "__main__":
    main()

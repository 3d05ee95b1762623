"""What people use today, on the same GPU: PyTorch ceilings, attention kernels, training steps, generation.

`benches/gpu/run` calls it; one JSON line a call. Random weights of the shapes that `temper bench` has, bf16, AdamW (fused),
gradient norm clipped to 1. Liger and PEFT are used where they are installed; without them the call says so and fails.
"""
import argparse, json, statistics, time

import torch

SHAPES = {  # family, hidden, intermediate, layers, heads, kv heads, head size, vocabulary
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49152),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936),
}


def seconds(call, repeat=10, warm=3):
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e-3


def normal(*shape, grad=False):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def ceilings():
    a, b = normal(8192, 8192), normal(8192, 8192)
    out = {"matmul_8192_tflops": 2 * 8192**3 / seconds(lambda: a @ b.T) / 1e12}
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    out["copy_gb_per_second"] = 8 * x.numel() / seconds(lambda: y.copy_(x)) / 1e9
    for m, n, k in [(16384, 9728, 896), (16384, 896, 4864), (16384, 1152, 896), (16384, 896, 896), (16384, 17920, 1536)]:
        a, b = normal(m, k), normal(n, k)
        out[f"nt_{m}_{n}_{k}_tflops"] = 2 * m * n * k / seconds(lambda: a @ b.T) / 1e12
    return out


def attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    out = {}
    for batch, length, heads, kv_heads, size in [(8, 2048, 14, 2, 64), (2, 8192, 16, 8, 128)]:
        q = normal(batch, heads, length, size, grad=True)
        k, v = (normal(batch, kv_heads, length, size, grad=True) for _ in range(2))
        flops = 2 * batch * heads * size * length * (length + 1)
        for name, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]:
            with sdpa_kernel(backend):
                def call():
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                forward = seconds(call)
                y = call()
                dy = torch.randn_like(y)
                backward = seconds(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))
            out[f"{name}_{batch}x{length}_{heads}/{kv_heads}_{size}"] = {
                "forward_tflops": round(flops / forward / 1e12, 1), "backward_tflops": round(2.5 * flops / backward / 1e12, 1)}
    return out


def model(shape, liger):
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
    family, hidden, mlp, layers, heads, kv_heads, size, vocab = SHAPES[shape]
    if liger:
        import liger_kernel.transformers as kernels
        getattr(kernels, f"apply_liger_kernel_to_{family}")()
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=True, max_position_embeddings=32768, rms_norm_eps=1e-5,
        eos_token_id=None, bos_token_id=None, pad_token_id=0, **({} if family == "qwen2" else {"head_dim": size}))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    return made, vocab


def train(a):
    made, vocab = model(a.shape, a.liger)
    made.config.use_cache = False
    if a.lora:
        from peft import LoraConfig, get_peft_model
        made = get_peft_model(made, LoraConfig(r=a.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True)
    ids = torch.randint(0, vocab, (a.batch, a.length), device="cuda")
    call = torch.compile(made) if a.compile else made

    def step():
        call(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(a.repeat + 3):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[3:])
    return {"tokens_per_second": a.batch * a.length / median, "seconds_per_step": median, "first_step_seconds": times[0],
            "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def generate(a):
    made, vocab = model(a.shape, False)
    made.eval()
    ids, new = torch.randint(0, vocab, (256, 160), device="cuda"), 96
    made.generate(ids, max_new_tokens=8, do_sample=False)
    torch.cuda.synchronize()
    start = time.perf_counter()
    made.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return {"batch": 256, "new_tokens": new, "seconds": taken, "tokens_per_second": 256 * new / taken}


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["ceilings", "attention", "train", "generate"])
parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--repeat", type=int, default=10)
parser.add_argument("--lora", type=int, default=0)
parser.add_argument("--liger", action="store_true")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()
calls = {"ceilings": ceilings, "attention": attention, "train": lambda: train(args), "generate": lambda: generate(args)}
result = calls[args.what]()
import transformers
print(json.dumps(dict(peer=args.what, torch=torch.__version__, transformers=transformers.__version__, **result)), flush=True)

"""python theory.py: the bounds beside the errors measured on a checkpoint, layer by layer."""
import torch

import lorc
import model
import theory
from runtime import checkpoint, text


def own_text(llama, prompt, length=512):
    """Tokens (1, T): the prompt and a continuation sampled at temperature 1 with seed 0."""
    n = min(length, llama.config.context) - len(prompt)
    if not prompt or n < 1:
        most = n + len(prompt) - 1
        raise model.UserError(f"the prompt has {len(prompt)} tokens; give 1 to {most}")
    start = torch.tensor([prompt])
    caches = lorc.new_caches(llama, "full", len(prompt) + n)
    new = lorc.generate(llama, caches, start, n, temperature=1.0)
    return torch.cat((start, torch.stack(list(new), 1)), 1)


def run(args):
    """Print the table of layers, and Thm. 3 on the checkpoint's matrices. Returns the status."""
    folder = checkpoint.find_model(args.model)
    checkpoint.check(folder)
    llama = model.load(folder, torch.float32)
    tokens = own_text(llama, text.Tokenizer(folder, llama.config).encode(args.prompt))
    print("measured / bound           Thm. 1        mean error   attention        Eq. 19")
    print("layer  d_c    worst K  worst V        V (equal)   worst  median    K      V")
    for i, d_c, k, v, mean, worst, median, fk, fv in theory.table(llama, tokens, args.kept):
        print(f"{i:5d} {d_c:4d}   {k:8.3f} {v:8.3f} {mean:16.6f} "
              f"{worst:7.3f} {median:7.4f}  {fk:5.3f}  {fv:5.3f}")
    print_network(theory.square_net(llama), args.kept)
    return 0


def print_network(Ws, kept):
    """Print Thm. 3 (printed, corrected, a priori) for the matrices Ws and two input norms."""
    ks = [min(len(W) - 1, max(1, round(kept * len(W)))) for W in Ws]
    phi, L_phi = theory.PHI["silu"]
    direction = torch.linalg.svd(Ws[0])[2][ks[0]]
    for scale in (1.0, 1e6):
        x = scale * direction
        x_tilde = theory.forward([theory.compressed(W, k) for W, k in zip(Ws, ks)], x, phi)
        error = theory.norm(theory.forward(Ws, x, phi)[-1] - x_tilde[-1])
        print(f"Thm. 3 on {len(Ws)} real blocks, phi = SiLU, ||x|| = {scale:g}: error {error:.3g}; "
              f"printed {sum(theory.theorem_3_printed(Ws, ks, L_phi)):.3g}, "
              f"corrected {sum(theory.theorem_3(Ws, ks, L_phi, x_tilde)):.3g}, "
              f"a priori {sum(theory.theorem_3_a_priori(Ws, ks, L_phi, x)):.3g}")

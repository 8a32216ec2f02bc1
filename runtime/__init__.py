"""What it takes to run the method on any checkpoint; nothing here is in the papers.

    cli.py          flags, which of them can be combined, how a command ends  (needs no torch)
    jobs.py         one command, from the folder to the report
    scoring.py      errors of keys and values, perplexity, divergence from the full cache
    report.py       the tables for a reader, the JSON for a program
    advice.py       the command that a report suggests next
    bounds.py       python theory.py: the bounds beside measured errors
    commuting.py    a basis of keys that commutes with RoPE
    checkpoint.py   finds a folder or Hub id, and refuses a damaged one in one line
    saved_bases.py  the file that --save writes and --bases reads
    text.py         tokenizer, end tokens, streaming
    chat_template.py  renders a chat template in a sandbox, in a process of its own
    compiled.py     --compile: the decode step with fixed shapes, one CUDA graph
    fused.py        Triton kernels for that step: attention over latents
    distributed.py  torchrun: the layers of one model over several processes

lorc.py, cache.py, model.py and theory.py import none of it, except that `python lorc.py` and
`python theory.py` hand over to runtime/cli.py.
"""

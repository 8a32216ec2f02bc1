"""What it takes to run the method on a stranger's checkpoint; nothing here is in the papers.

    cli.py          flags, which of them go together, how a command ends      (needs no torch)
    jobs.py         one command, from the folder to the report
    report.py       the tables for a reader, the JSON for a program
    checkpoint.py   find a folder or Hub id, refuse a bad one in a line; saved bases
    text.py         tokenizer, chat template in its sandbox, streaming
    fast.py         --compile: the decode step with fixed shapes, one CUDA graph
    distributed.py  torchrun: the layers of one model over several processes

lorc.py, cache.py, model.py and theory.py import none of it (but for `python lorc.py` itself).
"""

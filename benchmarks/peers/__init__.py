"""The same training by what people would use instead, side by side in the same run: `python -m benchmarks.peers`.

Each peer is a script as its user would write it, started as its user would start it. What measures them is in
`rounds.py`; what all scripts share (reading the job, saying when a step has ended) in `common.py`.
"""

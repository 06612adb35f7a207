"""Model families of installed libraries, tiny and with random weights: hzo's gradient beside backpropagation's.

``python -m hzo_lab.zoo`` tries one family a process and writes one line of JSON for each; ``--table`` prints them.
"""

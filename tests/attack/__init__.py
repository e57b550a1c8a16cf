"""What `python tests/attack.py` tries: hostile files and options, random calls, killed runs, strangers on the network.

`harness.py` runs a case in a process of its own and says what broke; each other file makes the cases of some families.
"""

"""The laboratory: the real scheduler, policies and block manager on machines that are not at hand.

Time is virtual. A step takes what its bytes and operations take on the machine described, a copy takes
its bytes over the link. Good for comparing policies on one machine; no measurement of any.
"""

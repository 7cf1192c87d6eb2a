"""What may be taken from which block: the lists that stand between a block's state and its slots' reuse."""

from collections import OrderedDict

from tidegate.engine.memory.block import Block


class Shelves:
    """Each list is in the order in which its blocks make way. A block is put on one by ``BlockStore.settle``
    alone, from its slots and holders, and taken off before any of these change.
    """

    def __init__(self) -> None:
        self.evictable: OrderedDict[Block, None] = OrderedDict()
        """On the device, and nobody's: known prefixes."""
        self.evictable_parked: OrderedDict[Block, None] = OrderedDict()
        """On the device, of a sequence that will load it again: the host has a copy."""
        self.draining: OrderedDict[Block, None] = OrderedDict()
        """The device slot comes free by itself, when a copy ends or a step is collected."""
        self.host_prefixes: OrderedDict[Block, None] = OrderedDict()
        """On the host, and nobody's."""
        self.host_mirrors: OrderedDict[Block, None] = OrderedDict()
        """On the host, of a sequence that has it on the device as well."""

    @property
    def num_on_device(self) -> int:
        """Device slots that may be taken."""
        return len(self.evictable) + len(self.evictable_parked)

    @property
    def num_on_host(self) -> int:
        """Host slots that may be taken without dropping anything that a sequence will come back for."""
        return len(self.host_prefixes) + len(self.host_mirrors)

    def next_on_device(self) -> Block:
        """A prefix that nobody holds goes before the blocks of a sequence that is sure to come back."""
        return next(iter(self.evictable or self.evictable_parked))

    def next_on_host(self) -> Block | None:
        """Prefixes first; then copies of blocks that are on the device as well."""
        return next(iter(self.host_prefixes or self.host_mirrors), None)

    def is_takeable(self, block: Block) -> bool:
        """Whether the block's device slot may be taken."""
        return block in self.evictable or block in self.evictable_parked

    def take_off(self, block: Block) -> None:
        """Nothing may be taken from a block between a change of its holders and ``settle``."""
        for shelf in (self.evictable, self.evictable_parked, self.host_prefixes, self.host_mirrors):
            shelf.pop(block, None)

"""All that the CUDA device keeps of the rows from step to step, in one tensor of words.

One tensor, so that one kernel can store whatever is new of any of it (``cuda_inbox.py``).

Legend: G KV groups, X rows, L positions of a row, M blocks of a row, W words of a row's sampling parameters.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.device.streams import Device, Stream
from tidegate.engine.model.cuda_inbox import PACKET_WORDS, Inbox
from tidegate.engine.request import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from tidegate.kernels.triton.sampling_rows import PARAMETER_WORDS

PADDING_ROW = -1
_ALIGNMENT = 4


class DeviceState:
    def __init__(
        self,
        device: Device,
        stream: Stream,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        max_step_tokens: int,
        num_groups: int,
        vocab_size: int,
    ) -> None:
        """Raises ``ValueError`` where it is more than an int32 counts."""
        width = -(-max_model_len // block_size)
        # Of a step: five numbers a token and row at most (prefill's tiles), each twice over; two for each
        # scored token of a prompt; the tokens that have a bias or may not come yet; and a mask for each row.
        # Those fit into one packet: for the next ones the host would wait.
        mask_words = max_rows * -(-vocab_size // 32)
        extra_words = 32 + 3 * MAX_LOGIT_BIASES + 2 * MAX_STOP_TOKEN_IDS
        inbox_words = 18 * (max_step_tokens + max_rows) + extra_words * max_rows + mask_words
        sizes = [
            max_rows * max_model_len,
            num_groups * max_rows * width,
            max_rows * PARAMETER_WORDS,
            _ALIGNMENT,
            max_rows,
            max_rows,
            inbox_words,
        ]
        ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
        if ends[-1] >= 2**31:
            raise ValueError(
                f"max_num_seqs {max_rows} times max_model_len {max_model_len} is more than 31 bits count; "
                "lower the one or the other"
            )
        words = torch.zeros(ends[-1], dtype=torch.int32, device=device.torch_device)
        firsts = [0, *ends[:-1]]
        parts = [words[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
        self.tokens_XL = parts[0].view(max_rows, max_model_len)
        self.tables_GXM = parts[1].view(num_groups, max_rows, width)
        self.parameters_XW = parts[2].view(max_rows, PARAMETER_WORDS)
        self.decode_place = parts[3][:1]
        """The word of the ring where the first of a step's decodes leaves its token."""
        self.decode_rows = parts[4]
        """The rows of a step of decodes alone..."""
        self.decode_starts = parts[5]
        """...and the position of each one's last token. At one place in every step: graphs read them."""
        self._firsts: list[int] = firsts
        self._table_shape = max_rows, width
        self.inbox = Inbox(device, stream, words, firsts[-1], PACKET_WORDS + mask_words)

    def set_row(self, row: int, token_ids: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        """``block_ids``: for each group."""
        self.inbox.store(row * self.tokens_XL.shape[1], np.array(token_ids, np.int32))
        for group, ids in enumerate(block_ids):
            self.inbox.store(self._place_of(group, row, 0), np.array(ids, np.int32))

    def set_block(self, row: int, group: int, index: int, block_id: int) -> None:
        self.inbox.store(self._place_of(group, row, index), np.array([block_id], np.int32))

    def _place_of(self, group: int, row: int, index: int) -> int:
        rows, width = self._table_shape
        return self._firsts[1] + (group * rows + row) * width + index

    def set_parameters(self, row: int, record: npt.NDArray[np.int32]) -> None:
        self.inbox.store(self._firsts[2] + row * PARAMETER_WORDS, record)

    def set_decodes(self, place: int, rows_S: npt.NDArray[np.int32], starts_S: npt.NDArray[np.int32]) -> None:
        self.inbox.store(self._firsts[3], np.array([place], np.int32))
        self.inbox.store(self._firsts[4], rows_S)
        self.inbox.store(self._firsts[5], starts_S)

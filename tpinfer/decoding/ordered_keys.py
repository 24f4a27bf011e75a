"""A logit and its token as one int64 that sorts by falling logit, then by rising token id.

The upper half is the float's bits, turned so that they compare as integers; the lower half counts
token ids down. So the largest key is the likeliest token, ties go to the lowest id, and candidates
of any ranks merge by one sort of whole numbers.

Letters: R rows, V local vocabulary, C candidates, P ranks.
"""

import torch

NO_KEY = -(1 << 63)
"""Below every key: fills places that hold no token."""
NAN_KEY = (1 << 63) - 1
"""Above every key: a row that holds NaN."""
CHUNK = 64
"""Logits whose maximum is taken first, so that most of the vocabulary is read once."""
_LOW = (1 << 32) - 1
_SMALL_VOCABULARY = 4096


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """float32 -> int32 in the same order; both zeros give 0."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def make_keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Keys of float32 values and int64 ids (0 to 2**32 - 1) that broadcast against each other."""
    return (ordered_bits(values).long() << 32) + (_LOW - ids)


def key_ids(keys: torch.Tensor) -> torch.Tensor:
    """int64 ids of keys."""
    return _LOW - (keys & _LOW)


def key_values(keys: torch.Tensor) -> torch.Tensor:
    """float32 values of keys; NaN for NAN_KEY and NO_KEY."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def best_keys(logits_RV: torch.Tensor, first: int) -> torch.Tensor:
    """`top_keys` of one key a row, by torch's maximum: the first of equal ones, NaN above all."""
    values, ids = logits_RV.max(-1, keepdim=True)
    return make_keys(values, ids + first).masked_fill_(values.isnan(), NAN_KEY)


def top_keys(logits_RV: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The `count` largest keys of each row, falling, int64 [R, count]; token ids begin at `first`.

    Padded with NO_KEY where V < count. A row that holds NaN has NAN_KEY in front.
    """
    num_rows, width = logits_RV.shape
    num_chunks = width // CHUNK
    if width < _SMALL_VOCABULARY or num_chunks <= 2 * count:
        ids = torch.arange(first, first + width, device=logits_RV.device)
        keys, highest = make_keys(logits_RV, ids), logits_RV.amax(-1)
    else:
        keys, highest = _keys_of_best_chunks(logits_RV, first, count)
    found = _largest(keys, min(count, keys.shape[1]))
    if found.shape[1] < count:
        padding = found.new_full((num_rows, count - found.shape[1]), NO_KEY)
        found = torch.cat((found, padding), 1)
    found[:, 0].masked_fill_(highest.isnan(), NAN_KEY)
    return found


def _keys_of_best_chunks(
    logits_RV: torch.Tensor, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys among which the `count` largest are, and each row's highest logit.

    The k largest keys lie in the k chunks with the largest (maximum, lowest place).
    """
    num_chunks = logits_RV.shape[1] // CHUNK
    whole = num_chunks * CHUNK
    maxima = logits_RV[:, :whole].unflatten(1, (num_chunks, CHUNK)).amax(-1)
    highest = maxima.amax(-1)
    places = torch.arange(num_chunks, device=logits_RV.device)
    chosen = key_ids(_largest(make_keys(maxima, places), count))
    inside = torch.arange(CHUNK, device=logits_RV.device)
    columns = (chosen.unsqueeze(-1) * CHUNK + inside).flatten(1)
    keys = make_keys(logits_RV.gather(1, columns), columns + first)
    tail = logits_RV[:, whole:]
    if tail.shape[1]:
        highest = torch.maximum(highest, tail.amax(-1))
        ids = torch.arange(first + whole, first + logits_RV.shape[1], device=logits_RV.device)
        keys = torch.cat((keys, make_keys(tail, ids)), 1)
    return keys, highest


def merge_keys(keys_PRC: torch.Tensor) -> torch.Tensor:
    """The C largest keys of each row over all ranks, falling, int64 [R, C]."""
    size, num_rows, count = keys_PRC.shape
    if size == 1:
        return keys_PRC[0]
    return _largest(keys_PRC.transpose(0, 1).reshape(num_rows, size * count), count)


def _largest(keys: torch.Tensor, count: int) -> torch.Tensor:
    return keys.amax(-1, keepdim=True) if count == 1 else keys.topk(count, -1).values

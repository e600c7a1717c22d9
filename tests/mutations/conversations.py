"""Bugs planted in what makes samples of whole episodes, and in what scores tokens."""

_BATCHING = "tests/core/test_batching.py::test_a_sample_may_be_a_whole_episode"
_HEAD = "tests/numerics/test_tokens.py::test_the_head_s_log_probs_entropy_and_gradients_are_torchs"
_TALKING = "tests/core/test_talking.py"
_COLUMNS = "tests/core/test_columns.py::test_columns_join_as_tensors_do"

CONVERSATIONS = [
    (
        "packing: an episode begins with the end of the one before",
        "mmrl/types.py",
        "(over_TB[:, slot].nonzero()[:, 0] + 1).tolist()",
        "over_TB[:, slot].nonzero()[:, 0].tolist()",
        _BATCHING,
    ),
    (
        "packing: what is not there repeats the first decision",
        "mmrl/types.py",
        "return taken.masked_fill((index_NJ < 0)",
        "return taken.masked_fill((index_NJ < -1)",
        _BATCHING,
    ),
    (
        "batching: decisions that are not kept are trained",
        "mmrl/batching.py",
        "of_decisions(rollout.mask_TBK) & kept_NJ[..., None]",
        "of_decisions(rollout.mask_TBK)",
        _BATCHING,
    ),
    (
        "batch: units take turns among decisions",
        "mmrl/types.py",
        "x_NJ.repeat_interleave(self.old_log_probs_NK.shape[1] // x_NJ.shape[1], 1)",
        "x_NJ.repeat(1, self.old_log_probs_NK.shape[1] // x_NJ.shape[1])",
        _BATCHING,
    ),
    (
        "columns: joined without renumbering",
        "mmrl/columns.py",
        "return torch.tensor([0, *(places[id(item)] for item in column.items)], device=column.index.device)[column.index]",
        "return column.index",
        _COLUMNS,
    ),
    (
        "columns: equal objects are one",
        "mmrl/columns.py",
        "if thing is not None and id(thing) not in places:",
        "if thing is not None and thing not in items and id(thing) not in places:",
        "tests/core/test_columns.py::test_an_equal_object_is_another_one",
    ),
    (
        "head: the gradient forgets the temperature",
        "mmrl/numerics/tokens.py",
        "grad_entropy_M[piece, None]) / ctx.temperature",
        "grad_entropy_M[piece, None])",
        _HEAD,
    ),
    (
        "head: forbidden tokens are drawn",
        "mmrl/numerics/tokens.py",
        "logits.index_fill(-1, forbidden, -torch.inf)",
        "logits",
        _HEAD,
    ),
    (
        "head: the entropy's gradient has the wrong sign",
        "mmrl/numerics/tokens.py",
        "p * entropy_M[piece, None]\n            one_hot",
        "-p * entropy_M[piece, None]\n            one_hot",
        _HEAD,
    ),
    (
        "ppo: decisions that are not trained teach the critic",
        "mmrl/algorithms/ppo.py",
        "            batch.trained_NV,\n",
        "            batch.trained_NV | True,\n",
        "tests/algorithms/test_ppo.py::test_the_loss_equals_a_naive_twin",
    ),
    (
        "updates: a sample counts as one decision",
        "mmrl/updates.py",
        "values=max(int(batch.trained_NV.sum()), 1)",
        "values=max(int(trained.any(1).sum()), 1)",
        "tests/core/test_updates.py::test_decisions_of_a_sample_are_counted_one_by_one",
    ),
    (
        "picture: maps are composed the wrong way round",
        "mmrl/messages.py",
        "compose(self.to_source, to_this)",
        "compose(to_this, self.to_source)",
        "tests/core/test_messages.py::test_a_picture_made_of_a_picture_points_into_the_first",
    ),
    (
        "observation: conversations stay where they were when rows are selected",
        "mmrl/types.py",
        "tuple(self.conversations[i] for i in index_N.tolist())",
        "self.conversations[: len(index_N)]",
        f"{_TALKING}::test_conversations_are_collected_and_become_samples",
    ),
    (
        "playing: messages go to the first slots",
        "mmrl/playing.py",
        "self.decide(seen, tasks_N, decision), rows_N, len(tasks_B))",
        "self.decide(seen, tasks_N, decision), torch.arange(len(rows_N)), len(tasks_B))",
        f"{_TALKING}::test_conversations_are_played_whatever_the_seats",
    ),
    (
        "playing: messages come back in the order of the seats",
        "mmrl/playing.py",
        "return cat(actions)[place_N]",
        "return cat(actions)[: len(place_N)]",
        f"{_TALKING}::test_conversations_are_played_whatever_the_seats",
    ),
    (
        "columns: objects of the second part are those of the first",
        "mmrl/columns.py",
        "items = Column.of(item for column in columns for item in column.items).items",
        "items = (columns[0].items * 99)[: sum(len(column.items) for column in columns)]",
        f"{_TALKING}::test_conversations_are_collected_and_become_samples",
    ),
]

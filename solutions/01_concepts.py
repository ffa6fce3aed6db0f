# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercise 01: Counting parameters
#
# <div class="page-card">
#
# **You will be able to**
#
# - count a SwiGLU, grouped-query and latent attention, and a whole sparse model, exactly;
# - work out from a model card what the authors do not print;
# - say which figure answers which question.
#
# {minutes} · {points} points · Needs: [Two bets](../book/concepts/two_bets.ipynb) and
# [Anatomy of a sparse block](../book/concepts/anatomy.ipynb).
#
# </div>
#
# Fill in the functions. The cell under each one checks it: it draws random sizes, names what holds, and shows the
# smallest case that does not. Until the first check of a question passes, the others are not reached. A question
# asks for your own code: calls into `moe_course` earn nothing here.
#
# Work on a copy: `moe-course start 01` makes one in `my_work/`. When you are stuck after two attempts,
# `solution("01.1")` prints a worked answer. Everything here is public, so these points are for you alone.

# %%
from moe_course.grading import check, solution, total

# %% [markdown]
# ## 01.1 Three matrices
#
# {meta 01.1}
#
# A SwiGLU maps a token $x$ of width $D$ to $W_\text{down}\,(\text{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x)$
# through a hidden width $F$. How many parameters has it? With `bias=True`, each matrix comes with a bias: one number
# for each of its outputs.
#
# *Worked example.* The older FFN has two matrices, $F \times D$ and $D \times F$. At $D = 4$ and $F = 16$ that is
# $64 + 64 = 128$ weights; with biases $16 + 4 = 20$ more.


# %% tags=["01.1"]
def swiglu_params(width: int, hidden: int, bias: bool = False) -> int:
    """Parameters of a SwiGLU of width D = `width` and hidden width F = `hidden`."""
    # Your code here.
    # BEGIN SOLUTION
    weights = 3 * width * hidden
    return weights + (2 * hidden + width if bias else 0)
    # END SOLUTION


# %%
check("01.1", swiglu_params)

# %% [markdown]
# ## 01.2 A fair swap
#
# {meta 01.2}
#
# You replace a two-matrix FFN of hidden width `dense_hidden` by a SwiGLU and want to keep the parameters: what hidden
# width does the SwiGLU need? GPUs like sizes that are multiples of some number, so give the **smallest multiple of
# `multiple`** with which the SwiGLU has **at least** as many weights (no biases).
#
# LLaMA 7B did this: width 4096, a dense hidden width of 4 x 4096 = 16384, multiples of 256. It arrived at 11008.


# %% tags=["01.2"]
def matched_hidden(width: int, dense_hidden: int, multiple: int) -> int:
    """Smallest multiple of `multiple` at which a SwiGLU holds at least the weights of the two-matrix FFN."""
    # Your code here.
    # BEGIN SOLUTION
    # 3·D·F >= 2·D·dense_hidden, so F = 2·dense_hidden / (3·multiple) multiples, rounded up in integers.
    return -(-2 * dense_hidden // (3 * multiple)) * multiple
    # END SOLUTION


# %%
check("01.2", matched_hidden)

# %% [markdown]
# ## 01.3 Grouped-query attention
#
# {meta 01.3}
#
# `heads` query heads of `head_dim` numbers each share `kv_heads` key and value heads of the same size. Count the four
# projections: queries, keys, values, output. No biases.
#
# Mind that `heads * head_dim` need not be the width: gpt-oss has width 2880, and 64 heads of 64.


# %% tags=["01.3"]
def gqa_params(width: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Weights of the four projections of grouped-query attention."""
    # Your code here.
    # BEGIN SOLUTION
    queries_and_output = 2 * width * heads * head_dim
    keys_and_values = 2 * width * kv_heads * head_dim
    return queries_and_output + keys_and_values
    # END SOLUTION


# %%
check("01.3", gqa_params)

# %% [markdown]
# ## 01.4 Latent attention
#
# {meta 01.4}
#
# DeepSeek-V2 and V3 store, for each token, one latent vector and one rotary key in place of all keys and values. A
# key has a part that is compared by content (`nope_dim` numbers) and a part that carries the position (`rope_dim`).
# Five matrices, each written as (outputs) x (inputs):
#
# | matrix | outputs | inputs |
# |---|---|---|
# | query down | `q_rank` | `width` |
# | query up | per head: `nope_dim` + `rope_dim` | `q_rank` |
# | key-value down | `kv_rank` + `rope_dim` (the rotary key, shared by all heads) | `width` |
# | key-value up | per head: `nope_dim` (key) + `v_dim` (value) | `kv_rank` |
# | output | `width` | per head: `v_dim` |
#
# Each of the two latents passes an RMSNorm, which has one weight per entry: count these too. The rotary key is not
# normalised. The first two matrices are counted for you; finish the function.


# %% tags=["01.4"]
def mla_params(
    width: int,
    heads: int,
    q_rank: int,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
) -> int:
    """Weights of multi-head latent attention, with the norms on its two latents."""
    query_down = q_rank * width
    query_up = heads * (nope_dim + rope_dim) * q_rank
    # Your code here.
    # BEGIN SOLUTION
    kv_down = (kv_rank + rope_dim) * width
    kv_up = heads * (nope_dim + v_dim) * kv_rank
    output = width * heads * v_dim
    norms = q_rank + kv_rank
    return query_down + query_up + kv_down + kv_up + output + norms
    # END SOLUTION


# %%
check("01.4", mla_params)

# %% [markdown]
# ## 01.5 A whole sparse model
#
# {meta 01.5}
#
# Put it together. The model has
#
# - an input embedding and a separate output head, `vocab` x `width` each;
# - `layers` layers, each with grouped-query attention and two RMSNorms of `width` weights; one more norm at the end;
# - in the first `first_dense` layers one SwiGLU of hidden width `dense_hidden`;
# - in every other layer a router (`width` x `experts`, no bias), `experts` SwiGLUs of hidden width `expert_hidden`,
#   of which each token uses `k`, and `shared` more of the same size that every token uses.
#
# Return the pair `(total, active)`: what is stored, and what one token meets. The input embedding counts whole in
# both. You may call your functions from above.


# %% tags=["01.5"]
def moe_params(
    width: int,
    layers: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    first_dense: int,
    dense_hidden: int,
    expert_hidden: int,
    experts: int,
    k: int,
    shared: int,
) -> tuple[int, int]:
    """(total, active) parameters of a sparse model; 0 <= first_dense <= layers."""
    # Your code here.
    # BEGIN SOLUTION
    sparse = layers - first_dense
    one_expert = swiglu_params(width, expert_hidden)
    rest = 2 * vocab * width + (2 * layers + 1) * width
    rest += layers * gqa_params(width, heads, kv_heads, head_dim)
    rest += first_dense * swiglu_params(width, dense_hidden)
    rest += sparse * (width * experts + shared * one_expert)
    return rest + sparse * experts * one_expert, rest + sparse * k * one_expert
    # END SOLUTION


# %%
check("01.5", moe_params)

# %% [markdown]
# ## 01.6 From a model card
#
# {meta 01.6}
#
# A model card prints the total, the active parameters, the number of experts and `k`. You want to know how many would
# be active if each token used `new_k` experts instead. (Whether the model still works well then is another question:
# released models have one `k`.)
#
# What the card gives is enough, whatever the attention and the embeddings look like, as long as every sparse layer
# has the same `experts` and `k`. Here all figures are exact integers up to 10^13, and 1 <= new_k <= experts; return
# an exact integer. (Real cards round: from 46.7 and 12.9 billion you would get 5.63 billion per choice, where 5.64 is
# exact.)


# %% tags=["01.6"]
def active_at(total: int, active: int, experts: int, k: int, new_k: int) -> int:
    """Active parameters with `new_k` experts per token, given those with `k`; 1 <= k < experts."""
    # Your code here.
    # BEGIN SOLUTION
    # Each further expert per token adds one expert in every sparse layer: (total - active) / (experts - k).
    per_pick = (total - active) // (experts - k)
    return active + (new_k - k) * per_pick
    # END SOLUTION


# %%
check("01.6", active_at)

# %% [markdown]
# ## 01.7 Which figure answers which question
#
# {meta 01.7}
#
# For each quantity below, return the count that it is proportional to, at a given precision: `"total"` or `"active"`,
# or `"neither"` if no count of parameters decides it. Leave the scores of attention and the key-value cache aside.
#
# - `"size of the checkpoint on disk"`
# - `"FLOPs to process one token"`
# - `"memory the weights need on the accelerators"`
# - `"weights read from memory to decode one token of one user"`
# - `"optimiser state when every weight is trained"`
# - `"whether it answers better than another model"`


# %% tags=["01.7"]
def figure_for(question: str) -> str:
    """'total', 'active' or 'neither'."""
    # Your code here.
    # BEGIN SOLUTION
    if question == "whether it answers better than another model":
        return "neither"
    per_token = (
        "FLOPs to process one token",
        "weights read from memory to decode one token of one user",
    )
    return "active" if question in per_token else "total"
    # END SOLUTION


# %%
check("01.7", figure_for)

# %% [markdown]
# ## Points

# %%
full_marks = total("01")
# BEGIN SOLUTION
assert full_marks, "the solutions must earn full marks"
# END SOLUTION

# %% [markdown]
# ## 01.H Defend a number (graded by hand, not counted above)
#
# A colleague writes: "Mixtral 8x7B is a 47B model, so it needs about two thirds of the GPU of a 70B one, and is about
# two thirds as fast." In at most 200 words, say which part of the sentence is right, which is wrong, and what you
# would have to know to mend it. Give every number with its unit and where it comes from. The rubric is on the page
# [For instructors](../book/start/instructors.md).

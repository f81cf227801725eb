"""AdapterHub beside ours: Houlsby adapters (`double_seq_bn`) in the same tiny BERT; equal outputs and gradients."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import dev, host

from tinyft import array, edit
from tinyft.formats import load
from tinyft.methods import Houlsby

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
adapters = pytest.importorskip("adapters", reason="adapters is not installed: pip install 'tinyft[peers]'")
pytestmark = pytest.mark.peers

V, B, T, C, L, m = 31, 3, 6, 12, 2, 4
BERT = {
    "vocab_size": V, "max_position_embeddings": 24, "hidden_size": C, "num_hidden_layers": L,
    "num_attention_heads": 3, "intermediate_size": 20, "initializer_range": 0.25,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("dtype, tol", [(np.float32, 1e-5), (np.float64, 1e-9)], ids=["single", "double"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("wrong", [False, True], ids=["houlsby", "one per layer"])
def test_houlsbys_adapters_stand_where_adapterhub_puts_them(wrong, padded, dtype, tol, tmp_path):
    """With `wrong`, AdapterHub's adapters stand after the MLP only (Pfeiffer's place); the comparison must see it."""
    torch.manual_seed(0)
    precision = torch.float64 if dtype == np.float64 else torch.float32
    rng = np.random.default_rng(1)
    base = transformers.BertModel(transformers.BertConfig(**BERT))
    with torch.no_grad():
        for p in base.parameters():
            p += 0.1 * torch.randn_like(p)
    base.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype=dtype)[0].eval()
    a = edit.attach(ours, Houlsby(m=m))
    ours.to(dtype=dtype)

    adapters.init(base)
    kind = adapters.SeqBnConfig if wrong else adapters.DoubleSeqBnConfig
    base.add_adapter("a", config=kind(reduction_factor=C / m, non_linearity="gelu"))
    base.train_adapter("a")
    base.to(precision).eval()
    pairs = []
    for i in range(L):
        layer = base.encoder.layer[i]
        places = {"mlp": layer.output} if wrong else {"attn": layer.attention.output, "mlp": layer.output}
        for part, place in places.items():
            bottleneck = place.adapters["a"]
            e = a.edits[f"blocks.{i}.{part}"]
            for theirs, mine in ((bottleneck.adapter_down[0], e.down), (bottleneck.adapter_up, e.up)):
                pairs += [(theirs.weight, mine.weight), (theirs.bias, mine.bias)]
    with torch.no_grad():
        for t, o in pairs:
            t.copy_(torch.tensor(rng.standard_normal(tuple(t.shape)) * 0.4))
            o.copy_(array.asarray(t.numpy()))

    ids = rng.integers(0, V, (B, T))
    mask = np.ones((B, T), bool)
    cover = rng.standard_normal((B, T, C)).astype(dtype)
    if padded:
        mask[1, 4:] = False
        cover *= mask[..., None]
    z = base(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (z * torch.tensor(cover)).sum().backward()
    y = ours(ids, mask=mask if padded else None)
    y.backward(dev(cover))
    z = z.detach().numpy()
    apart = np.abs(host(y) - z)[mask].max()
    if wrong:
        assert apart > 1e-3
        return
    assert apart <= tol * np.abs(z).max() and len(pairs) == 8 * L
    for t, o in pairs:
        g = t.grad.numpy()
        assert np.abs(g).max() > 1e-3 and np.abs(host(o.grad) - g).max() <= tol * max(np.abs(g).max(), 1)


def test_adapterhub_trains_the_adapters_only_and_houlsby_the_norms_too():
    """The paper trains layer norms; AdapterHub leaves them frozen, as norms=False does."""
    base = transformers.BertModel(transformers.BertConfig(**BERT))
    adapters.init(base)
    base.add_adapter("a", config=adapters.DoubleSeqBnConfig(reduction_factor=C / m))
    base.train_adapter("a")
    from tinyft import BERT as Bert
    from tinyft import BERTConfig
    counts = []
    for norms in (True, False):
        model = Bert(BERTConfig(V, 24, 2, C, L, 3, 20), head=None)
        edit.attach(model, Houlsby(m=m, norms=norms))
        counts.append(edit.count(model).trained)
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == counts[1]
    assert counts[0] == counts[1] + (2 * L + 1) * 2 * C

"Synthetic anatomy: templates to label ensembles, paired views, stores"
from benchmarks import _synth_labels, _synth_store, _synth_views

ROWS = {**_synth_labels.ROWS, **_synth_views.ROWS, **_synth_store.ROWS}

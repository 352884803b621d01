# %% [markdown]
# # medvol_nb, page by page
#
# > Where to start reading, and what stands on what.
#
# Each numbered page defines and explains one module, runs it, and checks it. A page uses only pages with lower numbers,
# so the order is also a reading order. Double-click a page here, run its cells, change them.
#
# | pages | what they hold |
# |---|---|
# | 00–02 | errors, random streams, atomic files; settings; parallel maps and resumable jobs |
# | 03 | synthetic volumes that all other pages use as data |
# | 04–04c | volumes: geometry, NIfTI, chunked stores, one reader for all formats |
# | 05–07a | intensity, the body in a scan, sliding windows, pictures |
# | 08–09 | checkpoints, the training loop, network blocks |
# | 10–11d | label spaces, data lists, splits, loading, conversion, pairing by name |
# | 12–14a | recipes of datasets, verification, class statistics, a training loader |
# | 20–22b | supervoxels: clustering, Segment-Anything features, the pipeline, points for training |
# | 30–37 | anatomical embeddings: preparation, views, network, losses, training, matching, registration, evaluation |
# | 40–44c | synthetic anatomy: templates, label ensembles, views, stores, contrastive pretraining, features |
# | 50–59a | U-Nets for several targets on chunked volumes: stores, patches, training, prediction, seams |
# | 60–63e | embryo time-lapses: archives, index, folders, fine-tuning, generation, quality, classifier |
# | 80–81 | browsers: planes, overlays, labels, matched points, patches, data lists, runs |
# | 85–87 | environment check, jobs with reports, the demo |
# | 89–90 | signatures and the command line made from them |
#
# The quickest way in is a volume file:

# %%
from medvol_nb import phantoms, plot
from medvol_nb.volume import Volume, affine_from, reorient, resample

patient = phantoms.abdomen()
ct = Volume(patient.img, affine_from(patient.spacing))
ct, reorient(ct, "LPS"), resample(ct, 4.0)

# %%
plot.planes(ct.data, patient.lbl, ct.spacing, title="a synthetic abdomen")

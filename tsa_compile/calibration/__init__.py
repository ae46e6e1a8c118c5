"""Which layers of a model may be sparse, measured on the model itself.

calibrate.py     `calibrate(model, prompts)`: by representation drift; published lists of layers
loss_search.py   `calibrate(..., objective="loss")`: by what sparse layers cost in the answers, within a bound
drift.py loss.py    how a layer's drift is measured, and the KL divergence of the answers
base.py fingerprint.py token_ids.py    files that know which model they are of; prompts
"""

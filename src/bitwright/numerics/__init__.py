"""Numbers and codes, pure: tensors and a Scheme in, a new value out; no files, no models, no global state.

`Scheme` says which numbers a code can stand for, `QTensor` holds codes under scales, `codec` goes from one to the other,
`loss` says what was lost. Imports: errors.
"""

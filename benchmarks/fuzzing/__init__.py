"""
Everything that reads bytes from outside, as functions that take bytes: hostile clouds, machines, files and clients.

Each target runs the product's own reader, from the transport's seam on, and judges what comes of it: a result that
keeps its promises, or an error of our tree. The campaign (`python -m benchmarks fuzz`) grows inputs from recordings
under coverage guidance; the tests replay the corpus and mutate it by chance.
"""

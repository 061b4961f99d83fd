"""Videos as requests bring them: what a file holds, which frames are taken, and reading those.

``container`` lists a file's frames and their times without decoding them, ``decode`` reads frames
by number, ``sampling`` says which are taken; these three need no vLLM.  ``load`` makes vLLM's video
loaders of them, ``connector`` does the same for lists of JPEGs.  docs/video.md describes the whole.
"""

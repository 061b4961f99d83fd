"""Videos: what a file holds, which frames are taken, reading those, and the order of their tokens.

``container`` lists a file's frames and their times without decoding them, ``decode`` reads frames
by number, ``sampling`` says which are taken; these three need no vLLM.  ``load`` makes vLLM's video
loaders of them, ``connector`` does the same for lists of JPEGs.  docs/video.md describes all of
this.  ``order`` says in which order a video's tokens enter the prompt, ``prune`` which of them do,
if a request asks to drop some.
"""

"""How good an edit is: one file per family of metrics, and the table of them all.

sample.py      what is measured: an edit and the clip it was made of
clip.py        CLIP frame consistency, text alignment and direction; PickScore
background.py  PSNR and SSIM outside a mask
flow.py        optical flow, by OpenCV or torchvision
warp.py        warp error
motion.py      motion fidelity
flicker.py     temporal flicker
judge.py       the judge of the miniature world
drawn.py       what the judge sees of an edit on the miniature
table.py       names, units, directions, and published numbers to stand beside
"""

// Tests of DiskImage.

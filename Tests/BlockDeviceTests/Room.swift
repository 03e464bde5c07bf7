// Tests of BlockDevice.

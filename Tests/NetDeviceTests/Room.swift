// Tests of NetDevice.

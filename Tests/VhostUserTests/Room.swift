// Tests of VhostUser.

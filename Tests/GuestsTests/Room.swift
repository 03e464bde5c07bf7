// Tests of Guests.

// Tests of FrontEnd.

// Sandbox: the walls around a process of a VM, from the fork until the last system-call filter.
//
// There are two halves, on both sides of exec, and `Stage` is the whole order of both with the reasons. The first half is
// the launcher's: `ChildLaunch` in Supervision, whose stretch between fork and exec is C (CSandbox); it stands there so
// that no device or core binary contains a way to start a process. The second half is here: `ProcessWalls` is what the
// new program does itself before it serves.
//
//     try ProcessWalls.raise(title: "vm/web1/blk0")   // first thing in the new program

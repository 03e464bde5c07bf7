// Sandbox: the walls around a process of a VM, from the fork until the last system-call filter.
//
// There are two halves, on both sides of exec. `ChildLaunch` describes a new process and starts it; what happens between
// fork and exec is C (CSandbox), because nothing may allocate there. `ProcessWalls` is what the new program does itself
// before it serves. `Stage` is the whole order with the reasons, for both halves.
//
//     let launch = ChildLaunch(arguments: ["martlet-block", "--fd=3"], descriptors: [null, null, 2, socket])
//     let child = try launch.start(executable)        // the supervisor
//     ...
//     try ProcessWalls.raise(title: "vm/web1/blk0")   // the new program, first thing

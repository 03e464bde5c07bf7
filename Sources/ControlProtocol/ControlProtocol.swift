// ControlProtocol: what the command, the supervisor, the core and the control socket say to each other.
//
// Three languages live here, each parsed once at its border into checked types:
// - the command line of `martlet run` (`OptionTable`, `VMConfiguration`), read by the command and by the supervisor;
// - the messages between supervisor and core (`SupervisorMessage`, `CoreMessage`; `protocol/control.md`);
// - JSON (`JSONValue`), for the answers on the control socket.
//
// The module opens nothing and starts nothing: text and bytes go in, values or one-sentence errors come out.
//
//     let configuration = try VMConfiguration(arguments: ["--kernel", "bzImage", "--disk", "path=root.img"])
//     configuration.disks[0].id                      // "blk0"

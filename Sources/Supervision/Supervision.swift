// Supervision: one VM's processes from birth to death. Opens what the command line names, starts the core and the device
// programs with their descriptors, hands the core its devices, watches everything by pidfd, answers `martlet ctl`, and
// leaves nothing behind. It never maps guest memory and never reads a device message.
//
//     let supervisor = try Supervisor(configuration)
//     exit(supervisor.run().rawValue)

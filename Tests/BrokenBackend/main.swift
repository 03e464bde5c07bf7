// A vhost-user back end with one defect of choice, for the tests of the probe. Without a defect it is a good one: a disk
// in memory, a network card that swallows frames, a console that swallows output, a file system that answers
// FUSE_INIT, or a source of random bytes.
//
//     broken-backend SOCKET TYPE [DEFECT]...

import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

signal(SIGPIPE, SIG_IGN)
let words = CommandLine.arguments
guard words.count >= 3, let device = DeviceID(nameOrNumber: words[2]) else {
  Log.error("usage: broken-backend SOCKET TYPE [DEFECT]...")
  exit(2)
}
Defects.chosen = Set(words.dropFirst(3))

do {
  let listener = try UnixSocket.listen(at: words[1])
  var disk = Disk()
  var connectionCount = 0
  while true {
    guard let socket = try UnixSocket.accept(listener) else { continue }
    connectionCount += 1
    if has("reconnect-dies"), connectionCount > 6 { exit(1) }
    if has("tires"), connectionCount > 20 { abort() }
    let session = Session(socket, device, disk, connectionCount)
    session.run()
    disk = session.disk
  }
} catch {
  Log.error("\(error)")
  exit(1)
}

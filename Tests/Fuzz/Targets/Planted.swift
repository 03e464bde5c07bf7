import CFuzz
import CLinux
import Glibc
import HostSystem

// Targets with a defect of each kind, behind words that only guidance by coverage finds: they prove that the machinery finds such
// things and says so. Nothing of them is in any other program.

let plantedDefects: [Target] = [
  Target(
    name: "planted-overflow", about: "a byte written past an array", isPlanted: true,
    run: { script in
      guard hasPassword(&script) else { return }
      script.rest().withUnsafeBufferPointer { cfuzz_planted_overflow($0.baseAddress, $0.count) }
    }),
  Target(
    name: "planted-region", about: "a read beyond a region of guest memory", isPlanted: true,
    run: { script in
      guard hasPassword(&script) else { return }
      let base = room.memory.translate(.init(GuestRoom.far), byteCount: GuestRoom.farEnd - GuestRoom.far)
      guard let last = base.map({ $0 + Int(GuestRoom.farEnd - GuestRoom.far) }) else { return }
      demand(last.load(as: UInt8.self) == 0, "what lies behind a region is not zero")
    }),
  Target(
    name: "planted-atomic", about: "the same by the loads that rings are read with", isPlanted: true,
    run: { script in
      guard hasPassword(&script) else { return }
      // The last eight bytes of a region, and eight behind it.
      let base = room.memory.translate(.init(GuestRoom.farEnd - 8), byteCount: 8)
      guard let last = base else { return }
      demand(clinux_load_acquire_u64(last + 8) == 0, "what lies behind a region is not zero")
    }),
  Target(
    name: "planted-leak", about: "a descriptor that is not closed", isPlanted: true,
    run: { script in
      guard hasPassword(&script) else { return }
      _ = dup(2)
    }),
  Target(
    name: "planted-trap", about: "an array index out of range", isPlanted: true,
    run: { script in
      guard hasPassword(&script) else { return }
      let table = [1, 2, 3]
      demand(table[Int(script.byte() | 4)] == 0, "the table holds something else")
    }),
  Target(
    name: "planted-demand", about: "a broken promise", isPlanted: true,
    run: { script in demand(!hasPassword(&script), "the password was never to be found") }),
]

private let room = GuestRoom()

/// Four bytes, compared one by one.
@inline(never)
private func hasPassword(_ script: inout Script) -> Bool {
  guard script.byte() == 0x46, script.byte() == 0x75 else { return false }
  guard script.byte() == 0x7A else { return false }
  return script.byte() == 0x21
}

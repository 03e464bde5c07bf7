// Plays a process of a VM that has been taken over. Started by the real launcher behind the real walls, it tries what such
// a process would, each attempt in a child of its own behind the filter of one role, and tells on descriptor 1 how each
// ended: `NAME killed SIGNAL` or `NAME got RESULT`.
//
//     --lists=base,block    the role's lists; none: no filter, so that the walls behind it show
//     --what=attacks        the attacks of HostileAttacks
//     --what=sweep          every system call that no rule allows, and every rule with altered arguments: told are those
//                           that were not killed; and every allowed call: told are those that were
//     --what=deeds          what libc and the kernel do of their own accord (Deeds.swift), with the role's lists, and with each of
//                           the calls it takes away
//     --what=without        no attack: executes the program behind `--` as on a kernel without the calls of --calls=NAME,...
//     --victim=PID          a process outside
//     --files=on|off        Landlock
//     --confine=UID         started as root, not by the launcher: each attempt behind the supervisor's own walls, with this uid
// Descriptors: 1 the report, 3 a sealed memory file, 4 a connected socket.

import CSandbox
import Glibc
import HostSystem
import HostileAttacks
import Sandbox

func value(_ option: String) -> String? {
  arguments.first { $0.hasPrefix("--\(option)=") }.map { String($0.dropFirst(option.utf8.count + 3)) }
}

let arguments = OwnProgram.arguments
let lists = (value("lists") ?? "").split(separator: ",").compactMap { SystemCallList(rawValue: String($0)) }
let victim = CInt(value("victim") ?? "") ?? 1
let confinement = value("confine").flatMap { UInt32($0) }
let rules = lists.flatMap(\.rules)
/// With what the stand-in itself needs to tell, and to end.
let installed =
  rules
  + ["write", "exit_group"].compactMap(SystemCall.number).filter { number in
    !rules.contains { $0.number == number }
  }.map { SystemCallRule(number: $0, reason: "the report") }

if value("what") == "without" { executeWithout() }

try ProcessWalls.raise(title: nil)
try ProcessWalls.closeFiles(WallMode(rawValue: value("files") ?? "on") ?? .on)

/// The calls fail with ENOSYS for the program and all that it starts.
func executeWithout() -> Never {
  let numbers = (value("calls") ?? "").split(separator: ",").map { CInt(SystemCall.number(String($0)) ?? .max) }
  let words = Array(arguments.drop { $0 != "--" }.dropFirst())
  guard let program = words.first, !numbers.contains(-1) else { fatalError("a call is unknown, or no program is named") }
  // SAFETY: the numbers live for the call.
  guard unsafe numbers.withUnsafeBufferPointer({ unsafe attack_forget($0.baseAddress, CInt($0.count)) }) == 0 else { _exit(98) }
  // SAFETY: the words are copied for good; this process ends or becomes another program.
  let pointers = unsafe words.map { unsafe strdup($0) } + [nil]
  // SAFETY: as above; the array ends with nil.
  _ = unsafe pointers.withUnsafeBufferPointer { unsafe attack_execute(program, $0.baseAddress) }
  _exit(97)
}

// What the launcher would have given: first out of the way of the numbers, then, when the owners are gone, to their places.
if confinement != nil {
  do {
    let memory = try SharedMemory.sealed(name: "hostile", byteCount: 1 << 16)
    let pair = try UnixSocket.pair(.stream)
    guard dup2(memory.rawValue, 13) == 13, dup2(pair.first.rawValue, 14) == 14 else { fatalError("no descriptors") }
  }
  guard dup2(13, 3) == 3, dup2(14, 4) == 4 else { fatalError("no descriptors") }
}

func report(_ line: String) { Log.write(line, to: 1) }

enum Outcome: Equatable {
  case killed(Int32)
  case result(Int)
}

/// Runs `body` in a child behind the role's filter.
func behindTheFilter(_ body: () -> Int) -> Outcome {
  var ends: [CInt] = [-1, -1]
  guard unsafe pipe(&ends) == 0 else { fatalError("no pipe") }
  let child = attack_fork()
  if child == 0 {
    if let uid = confinement {
      // All namespaces but those of pids and users (linux/sched.h); CAP_KILL stays.
      var walls = csandbox_confinement(
        namespaces: 0x4E02_0000, change_identity: 1, uid: uid, gid: uid, capabilities: 1 << 5, file_limit: 256)
      var step: Int32 = 0
      // SAFETY: both are ours and alive for the call.
      if unsafe csandbox_confine(&walls, &step) != 0 { _exit(96) }
    }
    if !rules.isEmpty {
      do { try ProcessWalls.closeCalls(installed, .on) } catch { _exit(99) }
    }
    var result = body()
    // SAFETY: eight bytes of ours.
    _ = unsafe write(ends[1], &result, MemoryLayout<Int>.size)
    _exit(0)
  }
  close(ends[1])
  var code: CInt = 0
  let signal = unsafe attack_wait(child, &code)
  var result = 0
  // SAFETY: eight bytes of ours.
  let got = unsafe read(ends[0], &result, MemoryLayout<Int>.size)
  close(ends[0])
  if signal != 0 { return .killed(signal) }
  return .result(got == MemoryLayout<Int>.size ? result : -1000 - Int(code))
}

func call(_ number: UInt32, _ arguments: [UInt]) -> Outcome {
  // SAFETY: six numbers, alive for the call.
  behindTheFilter { unsafe arguments.withUnsafeBufferPointer { unsafe attack_call(Int(number), $0.baseAddress) } }
}

switch value("what") {
case "sweep": sweep()
case "deeds": for deed in Deed.all { tell(deed) }
default: attack()
}
report("end")

func attack() {
  var index: CInt = 0
  while let name = unsafe attack_name(index) {
    let text = unsafe String(cString: name)
    switch behindTheFilter({ attack_run(index, 3, 4, victim) }) {
    case .killed(let signal): report("\(text) killed \(signal)")
    case .result(let result): report("\(text) got \(result)")
    }
    index += 1
  }
}

func sweep() {
  let allowed = Set(installed.map(\.number))
  // uretprobe and uprobe: the kernel lets them past every filter (Linux 6.11 and 6.14), and they work from its own
  // trampolines only.
  let exempt: Set<UInt32> = [335, 336]
  // Beyond the newest call there are free numbers, and those of the other interface.
  for number in Array(0..<UInt32(640)) + [0x4000_0000, 0x4000_0001, 0x4000_0200, .max]
  where !allowed.contains(number) && !exempt.contains(number) {
    let outcome = call(number, [0, 0, 0, 0, 0, 0])
    if outcome != .killed(SIGSYS) { report("passed \(SystemCall.name(number)) \(outcome)") }
  }
  for rule in rules where !rule.conditions.isEmpty {
    for arguments in alterations(of: rule) where !isAllowed(rule.number, arguments) {
      let outcome = call(rule.number, arguments)
      if outcome != .killed(SIGSYS) { report("passed \(SystemCall.name(rule.number)) \(arguments) \(outcome)") }
    }
  }
  // These do not come back, or wait.
  // The child's own id, which tgkill wants, is not known here.
  let special = ["exit", "exit_group", "rt_sigreturn", "restart_syscall", "brk", "tgkill"].compactMap(SystemCall.number)
  for rule in rules where !special.contains(rule.number) {
    var arguments: [UInt] = [.max, 0, 0, 0, 0, 0]
    for condition in rule.conditions { arguments[condition.argument] = satisfying(condition) }
    if case .killed(SIGSYS) = call(rule.number, arguments) { report("refused \(SystemCall.name(rule.number)) \(arguments)") }
  }
}

func satisfying(_ condition: SystemCallRule.Condition) -> UInt {
  switch condition.test {
  case .masked(_, let value): UInt(value)
  case .anyOf(let values): UInt(values.first ?? 0)
  // In the child, which has another id: no call that passes is made with it.
  case .ownProcess: 0
  }
}

/// The rule's arguments with one of them changed: by each single bit, by its neighbours, and to the extremes.
func alterations(of rule: SystemCallRule) -> [[UInt]] {
  var base: [UInt] = [0, 0, 0, 0, 0, 0]
  for condition in rule.conditions { base[condition.argument] = satisfying(condition) }
  var all: [[UInt]] = []
  for condition in rule.conditions {
    let good = base[condition.argument]
    for bit in 0..<64 { all.append(replacing(base, condition.argument, good ^ (1 << UInt(bit)))) }
    for value in [good &+ 1, good &- 1, 0, UInt.max, UInt(UInt32.max)] { all.append(replacing(base, condition.argument, value)) }
  }
  return all
}

func replacing(_ arguments: [UInt], _ index: Int, _ value: UInt) -> [UInt] {
  var arguments = arguments
  arguments[index] = value
  return arguments
}

/// What the lists say, read by other eyes than the compiler of filters.
func isAllowed(_ number: UInt32, _ arguments: [UInt]) -> Bool {
  rules.contains { rule in
    rule.number == number
      && rule.conditions.allSatisfy { condition in
        let argument = UInt64(arguments[condition.argument])
        switch condition.test {
        case .masked(let mask, let value): return argument & mask == value
        case .anyOf(let values): return values.contains(argument)
        // Which id the child has is not known here: leave those out.
        case .ownProcess: return (1...64).contains(argument & 0xFFFF_FFFF)
        }
      }
  }
}

import Glibc

/// The program that is running.
public enum OwnProgram {
  /// The directory of `/proc/self/exe`: Martlet's programs find each other beside themselves.
  public static func directory() throws(SystemError) -> String {
    var buffer = [CChar](repeating: 0, count: 4096)
    // SAFETY: readlink stores at most the given count, which is one less than the buffer has.
    let count = unsafe readlink("/proc/self/exe", &buffer, buffer.count - 1)
    guard count > 0 else { throw SystemError("read /proc/self/exe", Errno.current) }
    let path = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    guard let slash = path.lastIndex(of: "/") else { return "/" }
    return slash == path.startIndex ? "/" : String(path[..<slash])
  }
}
